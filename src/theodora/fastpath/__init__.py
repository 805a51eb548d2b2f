"""A whole model faster: groups of layers, gated MLPs, norms, rotary embedding, packed attention; PEFT's models, too."""
