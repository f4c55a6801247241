"""foveal: attention-guided learning for vision transformers.

A vision transformer computes where it looks at every forward pass. foveal reads that attention off any ViT
exactly, with fused kernels left on, and uses it as a training signal.
"""

__version__ = "0.1.0"
