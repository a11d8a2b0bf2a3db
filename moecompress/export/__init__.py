"""Convert a finished output directory to another format, exactly or not at all."""

from moecompress.export.run import FORMATS, export_dir

__all__ = ["FORMATS", "export_dir"]
