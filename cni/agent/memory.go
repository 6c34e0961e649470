package agent

import (
	"context"
	"os"
	"runtime/debug"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/resident"
)

const (
	// idleTime is how long no pod must have started, nor all have been looked at, before the agent gives memory back.
	idleTime = 5 * time.Second
	// idleGC and busyGC are how much the heap may grow between collections, in percent: the agent is idle most of the time, and
	// on every node; but while many pods start at once, to collect as often would take a fifth of the time for each.
	idleGC, busyGC = 50, 200
)

// trim gives back, when pods have started and no more do, and after each look at all of them, the memory that only that has
// used: free heap, and the pages of the program's file. The agent has little to do most of the time.
func (a *agent) trim(ctx context.Context) error {
	idle := time.NewTimer(idleTime)
	defer idle.Stop()
	collect := func(int) {}
	if os.Getenv("GOGC") == "" {
		collect = func(percent int) { debug.SetGCPercent(percent) }
	}
	collect(idleGC)
	busy := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.enrol.used:
			if !busy {
				collect(busyGC)
			}
			busy = true
			idle.Reset(idleTime)
		case <-a.enrol.looked:
			idle.Reset(idleTime)
		case <-idle.C:
			collect(idleGC)
			busy = false
			if err := resident.Release(); err != nil {
				a.log.Debug("memory not given back", zap.Error(err))
			}
		}
	}
}

// use tells trim that a pod starts.
func (e *enroller) use() { wake(e.used) }

// look tells trim that all pods are looked at.
func (e *enroller) look() { wake(e.looked) }

func wake(who chan struct{}) {
	select {
	case who <- struct{}{}:
	default:
	}
}
