"""Triton kernels, one file an operation: the launchers behind the Triton operators of ``sslfast.ops.<op>``.

Importing this package needs neither Triton nor a GPU; importing one of its modules needs Triton.
"""
