"""Records, and what is made of them. Without this file `import bench.report` would find the command report.py."""
