package agent

import (
	"context"
	"runtime/debug"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/resident"
)

// idleTime is how long no pod must have started before the agent gives memory back.
const idleTime = 5 * time.Second

// trim gives back, when pods have started and no more do, the memory that only that has used: free heap, and the pages of the
// program's file. The agent has little to do most of the time.
func (a *agent) trim(ctx context.Context) error {
	idle := time.NewTimer(idleTime)
	defer idle.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.enrol.used:
			idle.Reset(idleTime)
		case <-idle.C:
			debug.FreeOSMemory()
			if err := resident.ReleaseProgram(); err != nil {
				a.log.Debug("memory not given back", zap.Error(err))
			}
		}
	}
}

// use keeps trim waiting.
func (e *enroller) use() {
	select {
	case e.used <- struct{}{}:
	default:
	}
}
