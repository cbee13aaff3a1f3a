"""From a teacher to the rows that an expert of each memory operation learns from (MemLoRA, arXiv
2512.04763): `collect` plays a teacher through the pipeline and keeps what it wrote, `clean` turns
what is fit into training rows and counts what is not.
"""
