"""What went wrong in a training and what to do: statistics are recorded, rules turn them into findings.

`recorder` (a callback of `fit`) and `evidence` fill a `Recording`; `judge` asks every rule of `rules/` about
it; each answers with a `Finding`. A rule is one pure function here and one file of `conf/diagnosis/rule/`.
"""
