"""What lies on disk and others may write to: opened once, asked through its descriptor, copied into memory."""
