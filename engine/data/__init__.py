"""CIFAR-10 on the disk and on the network: formats, checksums, downloads."""
