package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// What has failed once works again later, and each failure is told of.
func TestStockGoesOnAfterAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		ctx, cancel := context.WithCancel(t.Context())
		var at []time.Duration
		began := time.Now()
		done := make(chan struct{})
		go func() {
			defer close(done)
			keepStock(ctx, zap.New(core), func(ctx context.Context) error {
				if at = append(at, time.Since(began)); len(at) < 3 {
					return errors.New("no memory")
				}
				<-ctx.Done()
				return nil
			})
		}()
		time.Sleep(time.Hour)
		cancel()
		<-done
		if len(at) != 3 || at[1] < time.Second || at[2]-at[1] < time.Second || logs.Len() != 2 {
			t.Errorf("tried at %v, and told %d times", at, logs.Len())
		}
	})
}
