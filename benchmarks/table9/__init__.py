"""Table 9 of the paper on a CPU: the cost of a token in evaluation, ours and a vanilla Transformer.

python -m benchmarks table9
"""
