package ztunnel

import "github.com/fairlead-mesh/fairlead/internal/hbone"

// newDriver is what moves the bytes of tunnels.
func newDriver(Config) hbone.Driver { return hbone.Goroutines() }
