"""Stands for your fork of Megatron. Yours is installed; this one is as small as a fork can be, and is ours."""
