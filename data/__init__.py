"""Tiles on disk, and the joint augmentation of image, mask and soft target."""
