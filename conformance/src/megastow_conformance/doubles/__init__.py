"""Doubles of Megatron generations that cannot be had or installed, to train the suite's trainers with.

All of it is our own code. Each double is a folder that holds a package named ``megatron``, with the module paths, class
names, attributes and hazards of the generation it stands for; what the generations do alike is in the modules here. A
folder has to be put on the path by whoever wants it: nothing here is importable as ``megatron`` otherwise.

A run against a double says ``double`` in its report, and proves nothing about the real code beyond what the double's
own docstring claims to mirror.
"""
