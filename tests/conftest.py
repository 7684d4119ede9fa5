import torch

# The tests' tensors are tiny: a second thread costs more than it brings, and on a busy machine very much more.
torch.set_num_threads(1)
