package agent

import (
	"context"
	"time"

	"go.uber.org/zap"
)

// stockPause is how long nothing is made ready for pods' starts after that has failed.
const stockPause = 30 * time.Second

// keepStock runs stock until ctx ends, again and again if it fails, as when the node has no memory for a moment.
func keepStock(ctx context.Context, log *zap.Logger, stock func(context.Context) error) {
	for {
		err := stock(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		log.Warn("pods start slower than they could, for a while", zap.Error(err), zap.Duration("pause", stockPause))
		select {
		case <-ctx.Done():
			return
		case <-time.After(stockPause):
		}
	}
}
