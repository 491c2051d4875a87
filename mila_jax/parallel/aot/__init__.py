"""`mila plan`: the real training and sampling steps, compiled ahead of time for a TPU slice that nobody has to own.

Reading order: `chips` (constants), `sizes` and `program` (what is compiled), `child` and `compiler` (how), `hlo`, `costs`,
`collectives`, `walk` (what the compiled program does), `flops` (what the model asks for), `figures` (the two put together),
`layout`, `sweep`, `cache` (many of them), `terminal`, `page`, `command` (what the user sees). Every time and every utilisation
in here comes from a model of the chip; none was measured on one.
"""
