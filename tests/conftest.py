import torch

# The tests' tensors are tiny: a second thread costs more than it brings, on a busy machine much more.
torch.set_num_threads(1)
