package ztunnel

import (
	"crypto/fips140"
	"fmt"

	"github.com/fairlead-mesh/fairlead/internal/hbone"
)

// newDriver is what moves the bytes of tunnels: event loops, or goroutines over crypto/tls's own records where only
// validated cryptography may be used (GODEBUG=fips140) or the configuration says so. stop ends it, after all that use it.
func newDriver(cfg Config) (driver hbone.Driver, stop func(), err error) {
	if cfg.Goroutines || fips140.Enabled() {
		return hbone.Goroutines(), func() {}, nil
	}
	loops, err := hbone.Loops(cfg.Workers)
	if err != nil {
		return nil, nil, fmt.Errorf("start event loops: %w", err)
	}
	return loops, loops.Stop, nil
}
