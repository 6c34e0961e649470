package waypoint

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"golang.org/x/net/http2/hpack"
)

// tcpConnection is a live connection on a TCP chain.
type tcpConnection struct {
	in    *inbound
	chain string
	cut   func(error)
}

// tcpConnections is all of them, to be checked again when the configuration changes.
type tcpConnections struct {
	mu   sync.Mutex
	live map[*tcpConnection]struct{}
}

func (t *tcpConnections) add(c *tcpConnection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.live[c] = struct{}{}
}

func (t *tcpConnections) remove(c *tcpConnection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.live, c)
}

// recheck cuts the connections that the configuration does not allow any more. One whose chain has gone stays: its
// service was deleted, which does not end connections.
func (t *tcpConnections) recheck(s *snapshot) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.live {
		chain := s.entrance.chains[c.chain]
		if chain == nil {
			continue
		}
		if v := check(chain.rules, c.in.facts()); !v.allowed {
			c.cut(&failure{reason: reasonPolicyChanged, detail: v.String()})
		}
	}
}

// facts of a connection, without HTTP.
func (c *inbound) facts() *facts {
	return &facts{source: c.source, sourceIP: c.sourceIP, destination: c.to, remoteIP: c.sourceIP}
}

// admitTCP is the policy of a TCP chain.
func (p *Proxy) admitTCP(s *snapshot, c *inbound, chain string) *failure {
	if v := check(s.entrance.chains[chain].rules, c.facts()); !v.allowed {
		return &failure{reason: reasonDenied, detail: v.String()}
	}
	return nil
}

// forwardTCP carries a connection's bytes to an endpoint of the chain's cluster and back.
func (p *Proxy) forwardTCP(s *snapshot, c *inbound, client *serverConn, name string) {
	start := time.Now()
	chain := s.entrance.chains[name]
	cl := s.clusters[chain.cluster]
	p.metrics.tcpOpened(c, cl)
	to, e, f := p.connectTCP(s, c, cl)
	if f != nil {
		client.Abort(f)
		p.logTCP(c, cl, e, f, start, 0, 0)
		return
	}
	live := &tcpConnection{in: c, chain: name}
	var cut *failure
	var once sync.Once
	live.cut = func(err error) {
		once.Do(func() {
			cut = err.(*failure)
			client.Abort(err)
			reset(to)
		})
	}
	p.tcp.add(live)
	e.load.active.Add(1)
	sent, received, err := pipe(client, to)
	e.load.active.Add(-1)
	p.tcp.remove(live)
	once.Do(func() {}) // waits for a cut under way, and makes later ones nothing
	if cut == nil && err != nil {
		cut = &failure{reason: reasonUpstreamReset, err: err}
	}
	p.logTCP(c, cl, e, cut, start, sent, received)
}

// connectTCP opens a connection to an endpoint, trying others where that fails.
func (p *Proxy) connectTCP(s *snapshot, c *inbound, cl *cluster) (connection, *endpoint, *failure) {
	endpoints := s.endpointsOf(cl, c.to)
	forwarded := []hpack.HeaderField{{Name: "forwarded", Value: `for="` + c.client.String() + `";host=` + cl.service.host}}
	f := &failure{reason: reasonNoEndpoint, detail: "cluster " + cl.name + " has no endpoint"}
	var tried []*endpoint
	for range 3 {
		e := pickEndpoint(endpoints, tried, rand.Uint64(), rand.Uint64())
		if e == nil {
			break
		}
		ctx, cancel := context.WithTimeout(context.Background(), cl.connectTimeout)
		to, err := p.forwarder.connect(ctx, e, forwarded)
		cancel()
		if err == nil {
			return to, e, nil
		}
		tried = append(tried, e)
		if f = connectFailure(err); !f.connect {
			break
		}
	}
	if len(tried) > 0 {
		return nil, tried[len(tried)-1], f
	}
	return nil, nil, f
}

// pipe copies both ways until both directions have ended. Half close is passed on as half close, an error as a reset.
func pipe(client *serverConn, to connection) (sent, received int64, err error) {
	var wait sync.WaitGroup
	var up error
	wait.Go(func() {
		if sent, up = io.Copy(to, client); up == nil {
			up = to.CloseWrite()
		}
		if up != nil {
			reset(to)
		}
	})
	received, err = io.Copy(client, to)
	if err == nil {
		err = client.CloseWrite()
	}
	if err != nil {
		client.Abort(err)
		reset(to)
	}
	wait.Wait()
	client.Close()
	to.Close()
	return sent, received, errors.Join(err, up)
}

// reset ends a connection to an endpoint so that the endpoint sees a reset.
func reset(c connection) {
	switch c := c.(type) {
	case *net.TCPConn:
		_ = c.SetLinger(0)
		_ = c.Close()
	case interface{ Reset() }:
		c.Reset()
	}
}
