"""dsd-distill: a flow map that draws in one to four rows what its teacher draws with guidance in many."""
