"""From a noise schedule to finished latents: schedulers > probe > compile > tables > loop and device_loop."""
