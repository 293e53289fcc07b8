"""The core that eight paper implementations share: ``papercore.ops`` (torch only) and ``papercore.lab`` (command lines)."""
