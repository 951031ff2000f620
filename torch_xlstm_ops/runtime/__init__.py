"""What the package needs of torch, of the machine and of the files on it."""
