"""The command line: arguments -> configuration -> one call. Commands import what they need when they run."""
