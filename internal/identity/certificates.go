package identity

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

const (
	// firstRetry and maxRetry bound the wait after a failed fetch.
	firstRetry = 200 * time.Millisecond
	maxRetry   = 30 * time.Second
	// renewJitter is the part of a certificate's life by which its renewal, due at half of it, may come earlier, so
	// that certificates issued together are not renewed together.
	renewJitter = 0.1
)

// Certificates keeps certificates ready and fresh: one goroutine an identity fetches it ahead of need, renews it at
// about half of its life, and keeps one that is still valid when a renewal fails.
type Certificates struct {
	fetcher Fetcher
	log     *zap.Logger
	ctx     context.Context
	running sync.WaitGroup

	mu      sync.Mutex
	entries map[mesh.Identity]*entry
}

// entry is one identity's certificate.
type entry struct {
	// holders is how many Warms have not been Released; used is set by Certificate and cleared at each renewal. An
	// entry with neither is forgotten when its renewal is due.
	holders int
	used    bool
	cancel  context.CancelFunc
	// bundle and failure are the last success and what went wrong since; changed is closed when either changes.
	bundle  *Bundle
	failure error
	changed chan struct{}
}

// NewCertificates makes a cache whose goroutines end with ctx. Time is the time package's; tests run it in a
// testing/synctest bubble.
func NewCertificates(ctx context.Context, fetcher Fetcher, log *zap.Logger) *Certificates {
	return &Certificates{fetcher: fetcher, log: log, ctx: ctx, entries: map[mesh.Identity]*entry{}}
}

// Warm starts to keep an identity's certificate and returns at once. Each Warm needs its Release.
func (c *Certificates) Warm(id mesh.Identity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entry(id).holders++
}

// Release undoes one Warm; the last forgets the certificate and its key.
func (c *Certificates) Release(id mesh.Identity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[id]
	if e == nil || e.holders == 0 {
		return
	}
	if e.holders--; e.holders == 0 {
		c.forget(id, e)
	}
}

// Certificate is the current certificate of id. Where there is none yet (or it has expired), it waits for the fetch
// under way, which all callers share, until ctx ends; the error then tells why the fetch fails.
func (c *Certificates) Certificate(ctx context.Context, id mesh.Identity) (*Bundle, error) {
	for {
		c.mu.Lock()
		e := c.entry(id)
		e.used = true
		bundle, failure, changed := e.bundle, e.failure, e.changed
		c.mu.Unlock()
		if bundle != nil && time.Now().Before(bundle.NotAfter) {
			return bundle, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, waitError(id, ctx.Err(), failure)
		case <-c.ctx.Done():
			return nil, waitError(id, c.ctx.Err(), failure)
		}
	}
}

func waitError(id mesh.Identity, ended, failure error) error {
	if failure != nil {
		return fmt.Errorf("no certificate for %s: %w (%w)", id, failure, ended)
	}
	return fmt.Errorf("no certificate for %s yet: %w", id, ended)
}

// Status is a certificate kept, for people to look at.
type Status struct {
	Identity mesh.Identity
	// Bundle is nil before the first success.
	Bundle *Bundle
	// Err is why the last fetch failed, nil after a success.
	Err error
}

// All are the certificates kept, in no particular order.
func (c *Certificates) All() []Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Status, 0, len(c.entries))
	for id, e := range c.entries {
		out = append(out, Status{Identity: id, Bundle: e.bundle, Err: e.failure})
	}
	return out
}

// Wait returns when all goroutines have ended, after the context of NewCertificates has.
func (c *Certificates) Wait() { c.running.Wait() }

// entry finds or starts an entry; mu is held.
func (c *Certificates) entry(id mesh.Identity) *entry {
	if e := c.entries[id]; e != nil {
		return e
	}
	ctx, cancel := context.WithCancel(c.ctx)
	e := &entry{cancel: cancel, changed: make(chan struct{})}
	c.entries[id] = e
	c.running.Go(func() {
		defer cancel()
		c.keep(ctx, id, e)
	})
	return e
}

// forget ends an entry; mu is held.
func (c *Certificates) forget(id mesh.Identity, e *entry) {
	e.cancel()
	if c.entries[id] == e {
		delete(c.entries, id)
	}
	// Who waits on this entry finds, or starts, the next.
	close(e.changed)
	e.changed = make(chan struct{})
}

// keep fetches and renews until ctx ends or nobody wants the certificate.
func (c *Certificates) keep(ctx context.Context, id mesh.Identity, e *entry) {
	retry := firstRetry
	for {
		bundle, err := c.fetcher.Fetch(ctx, id)
		if ctx.Err() != nil {
			return
		}
		var wait time.Duration
		if err != nil {
			wait = retry/2 + rand.N(retry/2)
			retry = min(2*retry, maxRetry)
			c.log.Warn("fetch certificate", zap.Stringer("identity", id), zap.Duration("retry_in", wait), zap.Error(err))
		} else {
			wait = renewIn(bundle, time.Now(), rand.Float64())
			retry = firstRetry
			c.log.Debug("certificate issued", zap.Stringer("identity", id), zap.Time("not_after", bundle.NotAfter))
		}
		c.publish(e, bundle, err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		if c.unused(id, e) {
			return
		}
	}
}

// publish makes a fetch's outcome known.
func (c *Certificates) publish(e *entry, bundle *Bundle, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		e.bundle = bundle
	}
	e.failure = err
	close(e.changed)
	e.changed = make(chan struct{})
}

// unused forgets the entry where nobody holds it and nobody used it since its last fetch.
func (c *Certificates) unused(id mesh.Identity, e *entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.holders > 0 || e.used {
		e.used = false
		return false
	}
	c.forget(id, e)
	return true
}

// renewIn is how long after now a certificate is to be renewed: at half of its life, or up to renewJitter of it
// earlier as chance (0 to 1) has it, and not at once even where that has passed.
func renewIn(b *Bundle, now time.Time, chance float64) time.Duration {
	life := b.NotAfter.Sub(b.NotBefore)
	due := b.NotBefore.Add(life/2 - time.Duration(float64(life)*renewJitter*chance))
	return max(due.Sub(now), time.Second)
}
