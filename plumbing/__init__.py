"""What one trusts and skips: files, devices, terminals. The idea is in the five files above."""
