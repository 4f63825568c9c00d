"""What goes over the wire: the generated contracts (`baton.v1`) and how channels and servers are opened (`baton.rpc`).

Everyone may import it, clients too. It never imports torch, ray or another room of the project.
"""
from importlib.metadata import PackageNotFoundError, version

try:
    RELEASE = version("baton-serve")
except PackageNotFoundError:  # running from a checkout that was not installed
    RELEASE = "0.0.0+checkout"
