package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/tests/bench/load"
)

// role is one of a lane's three pods.
type role string

// The pods of a lane: a client, a server on the other machine, and a server on the client's own.
const (
	client role = "cl"
	remote role = "sv"
	nearby role = "s2"
)

var roles = []role{client, remote, nearby}

// pod is one pod of a lane.
type pod struct {
	role    role
	machine *machine
	ns      *os.File
	addr    netip.Addr
	group   group
	server  *process
}

// lane is one way for a connection to go. All lanes have the same pods, servers and clients.
type lane struct {
	name    string
	about   string // for people
	version string
	dir     string
	group   group
	pods    map[role]*pod
	proxies []*proxy
	// suite is what the lane's first tunnel negotiated, as seen on the wire.
	suite string
	spawn *spawner
	close []func() error
}

// proxy is one proxy process and the pods it serves.
type proxy struct {
	*process
	pods []role
}

// newLane makes a lane's pods and starts their servers.
func newLane(w *world, name string) (*lane, error) {
	l := &lane{name: name, spawn: w.spawn, dir: filepath.Join(w.dir, name), pods: map[role]*pod{}}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return nil, err
	}
	var err error
	if l.group, err = w.group.child(name); err != nil {
		return nil, err
	}
	for _, r := range roles {
		m := w.a
		if r == remote {
			m = w.b
		}
		p := &pod{role: r, machine: m}
		if p.ns, p.addr, err = m.addPod(); err != nil {
			return nil, err
		}
		// As on a node: pods below kubepods, proxies beside it.
		if p.group, err = l.group.child(filepath.Join(m.name, "kubepods", string(r))); err != nil {
			return nil, err
		}
		l.pods[r] = p
		if r == client {
			continue
		}
		p.server, err = command{
			name: "server of " + name, ns: p.ns, group: p.group, argv: []string{selfPath, "load", "server"},
			log: filepath.Join(l.dir, "server-"+string(r)+".log"), spawn: w.spawn,
		}.start()
		if err != nil {
			return nil, err
		}
		l.close = append(l.close, func() error { p.server.stop(); return nil })
	}
	return l, nil
}

// end stops what the lane has started, the last first.
func (l *lane) end() error {
	var errs []error
	for i := len(l.close) - 1; i >= 0; i-- {
		errs = append(errs, l.close[i]())
	}
	return errorsOf(errs...)
}

// serving lists the proxies on the way to a server: the client's side, and the server's side unless it is the same.
func (l *lane) serving(to role) []*proxy {
	var on []*proxy
	for _, r := range []role{client, to} {
		for _, p := range l.proxies {
			for _, served := range p.pods {
				if served == r && (len(on) == 0 || on[len(on)-1] != p) {
					on = append(on, p)
				}
			}
		}
	}
	return on
}

// smoke carries a few messages to each server, so that everything is known to work and tunnels exist.
func (l *lane) smoke(ctx context.Context) error {
	for _, to := range []role{remote, nearby} {
		var last error
		for range 20 {
			r, err := l.runLoad(ctx, load.Client{
				Kind: "pingpong", Addr: l.pods[to].addr.String(), Size: 64, Duration: 100 * time.Millisecond,
			})
			if last = err; err == nil && r.Units > 0 {
				break
			}
			time.Sleep(250 * time.Millisecond)
		}
		if last != nil {
			return fmt.Errorf("lane %s does not carry messages to %s: %w%s", l.name, to, last, l.lastWords())
		}
	}
	return nil
}

// lastWords are those of the lane's proxies, for error messages.
func (l *lane) lastWords() string {
	var b strings.Builder
	for _, p := range l.proxies {
		fmt.Fprintf(&b, "; %s: %s", p.name, lastLines(p.log, 3))
	}
	return b.String()
}

// awaitReady asks a proxy, in its namespace, until it says that it is ready.
func awaitReady(ctx context.Context, p *process, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	ask := http.Client{Timeout: time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			to, err := netip.ParseAddrPort(address)
			if err != nil {
				return nil, err
			}
			return netns.Dial(ctx, p.ns, netns.DialOptions{}, to)
		},
	}}
	for {
		if err := p.ended(); err != nil {
			return err
		}
		answer, err := ask.Get(url)
		if err == nil {
			answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				return nil
			}
			err = fmt.Errorf("it answers %s", answer.Status)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w; its last words: %s", p.name, err, lastLines(p.log, 5))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// workloads is the mesh in the format of the local files of Istio's ztunnel.
func (l *lane) workloads() string {
	var b strings.Builder
	b.WriteString("workloads:\n")
	for _, r := range roles {
		p := l.pods[r]
		fmt.Fprintf(&b, "- uid: cluster1//v1/Pod/default/%[1]s\n  name: %[1]s\n  namespace: default\n  serviceAccount: %[1]s\n"+
			"  trustDomain: cluster.local\n  workloadIps: [%[2]q]\n  protocol: HBONE\n  node: %[3]s\n  network: \"\"\n  services: {}\n", r, p.addr, p.machine.name)
	}
	return b.String()
}
