"""How fast a bundle is on this machine, stage by stage, against what the machine can do.

`stages` says what is measured, `timing` how, `roofs` what the machine's limits are, `work` what a stage has to do,
`run` does one stage in a process of its own, and `report` makes figures and tables of the results.

Contract: nothing here knows another implementation. Whoever wants to be compared gives a `Peer`; its contenders take
turns with the runtime's own in the same process.
"""
