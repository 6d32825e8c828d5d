"""`lina train`: an MoE language model on real text, on this machine's cores or GPUs."""
