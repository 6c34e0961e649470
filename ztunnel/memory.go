package ztunnel

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/resident"
)

const (
	// lookInterval is how often trim looks whether the process is quiet.
	lookInterval = 2 * time.Second
	// quietMoves is how many connections may come and go in lookInterval when it is.
	quietMoves = 50
	// leastMoves is how many must have since memory was given back last. With many open connections, which make collecting
	// garbage dear, it is a quarter of them.
	leastMoves = 500
)

// trim gives back, when the start or a burst of connections is over, the memory that only that has used: free heap, which Go
// would collect when it has doubled or after two minutes, and keep half of; and the pages of the program's file.
func (p *Proxy) trim(ctx context.Context) error {
	select {
	case <-p.source.Synced():
	case <-ctx.Done():
		return ctx.Err()
	}
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	before, given := 0, -leastMoves // connections that had come and gone at the last look, and when memory was given back
	for {
		select {
		case <-look.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		moves, live := p.connections.moved()
		if overdue(moves-before, moves-given, live) {
			given = moves
			if err := resident.Release(); err != nil {
				p.log.Debug("memory not given back", zap.Error(err))
			}
		}
		before = moves
	}
}

// overdue tells whether a burst is over and has left enough. moves is how many connections came and went in lookInterval,
// all since memory was given back, live how many there are.
func overdue(moves, all, live int) bool {
	return moves < quietMoves && all >= max(leastMoves, live/4)
}
