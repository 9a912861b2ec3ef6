"""What tests build their models, rows and runs from; no test file imports another one."""
