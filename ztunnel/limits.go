package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/hbone"
)

// Limits are what one pod may use of its node's proxy, so that neither a pod nor its peers take it from the others.
type Limits struct {
	// Connections of the pod at once, those it opens and those it is opened.
	Connections int
	// Tunnels into the pod at once, from all peers, those in their handshake included.
	Tunnels int
	// PeerTunnels are those of them that come from one address.
	PeerTunnels int
	// Streams at once in one of them.
	Streams int
	// BufferedBytes that the pod's tunnels may be sent before its applications have taken them, beyond the 256 KiB
	// that each tunnel may always be sent.
	BufferedBytes int64
	// HalfClosed is how long a connection may stay that one end has closed and the other does not use; 0 is for ever.
	HalfClosed time.Duration
}

var defaultLimits = Limits{
	Connections: 32768, Tunnels: 4096, PeerTunnels: 256, Streams: 1000, BufferedBytes: 256 << 20, HalfClosed: time.Hour,
}

// Limits beside those of package hbone.
const (
	limitConnections    hbone.Limit = "connections"
	limitDNSConnections hbone.Limit = "dns_connections"
)

// limitsFromEnv reads the limits; what is not said has its default.
func limitsFromEnv(getenv func(string) string, errs *[]error) Limits {
	l := defaultLimits
	for name, into := range map[string]*int{
		"FAIRLEAD_POD_MAX_CONNECTIONS": &l.Connections,
		"FAIRLEAD_POD_MAX_TUNNELS":     &l.Tunnels,
		"FAIRLEAD_PEER_MAX_TUNNELS":    &l.PeerTunnels,
		"FAIRLEAD_TUNNEL_MAX_STREAMS":  &l.Streams,
	} {
		if text := getenv(name); text != "" {
			n, err := strconv.ParseUint(text, 10, 31)
			if err == nil && n == 0 {
				err = errors.New("must be positive")
			}
			if err != nil {
				*errs = append(*errs, fmt.Errorf("%s: %w", name, err))
			}
			*into = int(n)
		}
	}
	if text := getenv("FAIRLEAD_POD_MAX_BUFFERED_BYTES"); text != "" {
		n, err := strconv.ParseUint(text, 10, 62)
		if err != nil {
			*errs = append(*errs, fmt.Errorf("FAIRLEAD_POD_MAX_BUFFERED_BYTES: %w", err))
		}
		l.BufferedBytes = int64(n)
	}
	if text := getenv("FAIRLEAD_HALF_CLOSED_TIMEOUT"); text != "" {
		d, err := duration(text)
		if err == nil && d < 0 {
			err = errors.New("must not be negative")
		}
		if err != nil {
			*errs = append(*errs, fmt.Errorf("FAIRLEAD_HALF_CLOSED_TIMEOUT: %w", err))
		}
		l.HalfClosed = d
	}
	return l
}

// limited counts a limit that one of the pod's peers, or the pod itself, has hit.
func (m *metrics) limited(p *pod, l hbone.Limit) {
	m.limits.WithLabelValues(p.Namespace, p.Name, string(l)).Inc()
}

// admit refuses a connection beyond the most that its pod may have.
func (s *connections) admit(c *connection) *failure {
	s.mu.Lock()
	n := c.pod.connections
	s.mu.Unlock()
	if n <= s.limits.Connections {
		return nil
	}
	s.metrics.limited(c.pod, limitConnections)
	return fail(reasonLimit, "pod %s/%s has its most connections (%d)", c.pod.Namespace, c.pod.Name, s.limits.Connections)
}

// carrier is what carries a connection's bytes: a stream of a tunnel, or a splice.
type carrier interface {
	Abort(error)
	Counters() (sent, received int64)
	HalfClosed() bool
}

// reap cuts, from time to time, the connections that one end has closed long ago and the other has not used since.
func (s *connections) reap(ctx context.Context) error {
	timeout := s.limits.HalfClosed
	if timeout <= 0 {
		<-ctx.Done()
		return ctx.Err()
	}
	tick := time.NewTicker(max(timeout/8, 10*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			for _, c := range s.list() {
				if c.abandoned(now, timeout) {
					c.abort(fail(reasonIdle, "half closed and idle for %v", timeout))
				}
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// idle is since when a connection has carried so many bytes and no more.
type idle struct {
	since time.Time
	at    int64
}

// abandoned tells whether the connection has been half closed and without a byte for so long. Only reap calls it.
func (c *connection) abandoned(now time.Time, timeout time.Duration) bool {
	c.mu.Lock()
	by := c.carrier
	c.mu.Unlock()
	if by == nil || !by.HalfClosed() {
		return false
	}
	if sent, received := by.Counters(); c.idle == nil || sent+received != c.idle.at {
		c.idle = &idle{since: now, at: sent + received}
	}
	return now.Sub(c.idle.since) >= timeout
}
