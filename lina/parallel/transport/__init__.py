"""What carries bytes between ranks: c10d, communicators of lina's own over NCCL, peers' mapped memory."""
