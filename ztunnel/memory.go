package ztunnel

import (
	"context"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/resident"
)

// settleTime is how long after the first configuration the process is taken to have done what only its start needs.
const settleTime = 5 * time.Second

// trim gives back, once, the pages of the program's file that only its start has used: the registration of every message
// of the interfaces spoken touches most of the file.
func (p *Proxy) trim(ctx context.Context) error {
	select {
	case <-p.source.Synced():
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-time.After(settleTime):
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := resident.ReleaseProgram(); err != nil {
		p.log.Debug("give back pages of the start: " + err.Error())
	}
	<-ctx.Done()
	return ctx.Err()
}
