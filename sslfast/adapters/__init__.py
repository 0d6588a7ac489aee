"""sslfast inside the packages that people already use: by one line, :func:`sslfast.patch`, or by an adapter class.

``sslfast.adapters.<package>`` holds, under the package's own names, its classes and functions with sslfast's kernels in
them. They import the package, so each is imported only when asked for.
"""

from ._patch import PACKAGES as PACKAGES, Patch, patch, unpatch

__all__ = ["Patch", "patch", "unpatch"]
