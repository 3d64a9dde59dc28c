"""thoraxrt: a trained chest X-ray model in, an engine that answers with findings and boxes out.

This package holds only the command line (`thoraxrt.cli`) and one symbolic link per room:
`thoraxrt.engine`, `thoraxrt.export`, `thoraxrt.proto`, `thoraxrt.server`, `thoraxrt.benchmarks`.
"""

__version__ = "0.1.0"
