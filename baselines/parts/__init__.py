"""What several methods are made of: searches, rings, adapters, pools, banks. Parts import parts, never a method."""
