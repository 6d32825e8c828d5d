"""Gradients summed over ranks in micro-ops that give way to tokens: queues, hooks, experts' replicas."""
