"""The losses, one file each: a function over :mod:`sslfast.ops` and :mod:`sslfast.distributed`, and its module form.

A family is one primitive, and families do not import one another. Functions and modules are public in :mod:`sslfast`.
"""
