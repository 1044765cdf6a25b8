"""Optimizers of parameters that several processes share: sharded by FSDP2, or copied by DDP."""
