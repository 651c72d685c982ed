"""What the package costs, as ratios to hand-written FastAPI. Start with README.md."""
