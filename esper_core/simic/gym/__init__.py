"""The gym: environments that train in lockstep, and the engines that compute them."""
