"""Image–text models whose image tower timm builds: C-RADIO with its SigLIP2 head, and TIPSv2."""
