"""SAMs with TinyViT as image encoder: MobileSAM, LiteMedSAM."""
