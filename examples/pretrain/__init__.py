"""Self-supervised pretraining by SimCLR, Barlow Twins or VICReg, with sslfast's fused loss beside a plain one."""
