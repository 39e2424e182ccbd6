def zero_state_bytes(plan):
    return {}
