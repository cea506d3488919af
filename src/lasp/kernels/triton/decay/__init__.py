"""The decay family: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t."""
