package ztunnel

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

const protocolUDP = "udp"

// maxQuery is the largest query taken by UDP, in bytes. A client with a larger one uses TCP.
const maxQuery = 4096

// receivePause is how long a listener waits after a failure to receive.
const receivePause = 50 * time.Millisecond

// packetListener receives the queries of a pod by UDP.
type packetListener struct {
	*netns.PacketListener
	slots bool
}

// slot is where the listener belongs.
func (l packetListener) slot() bpf.Slot {
	if l.Addr().Addr().Is6() {
		return bpf.DNSIPv6
	}
	return bpf.DNSIPv4
}

// listenPackets makes a pod's UDP listeners, on loopback: nobody but the pod reaches them there.
func listenPackets(p *pod) ([]packetListener, error) {
	var made []packetListener
	for _, addr := range loopback(purposes[purposeDNS].port, p.slots) {
		l, err := netns.ListenPacket(p.Netns, addr)
		if addr.Addr().Is6() && noFamily(err) {
			break
		}
		if err != nil {
			for _, l := range made {
				l.Close()
			}
			return nil, err
		}
		made = append(made, packetListener{l, p.slots})
	}
	return made, nil
}

// servePackets answers the queries that a listener receives until it is closed.
func (r *resolver) servePackets(ctx context.Context, p *pod, l packetListener) {
	buf := make([]byte, maxQuery)
	for {
		n, client, to, truncated, err := l.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			r.proxy.log.Warn("receive DNS query", zap.String("pod", p.Namespace+"/"+p.Name), zap.Error(err))
			time.Sleep(receivePause)
			continue
		}
		q, ok := parseQuery(buf[:n])
		if !ok || truncated {
			continue
		}
		q.message = bytes.Clone(q.message)
		asked := netip.AddrPortFrom(to, dnsPort)
		switch {
		case !to.IsLoopback():
			go r.respond(ctx, p, l, q, client, asked)
		case !l.slots:
			// A rule has rewritten the address and will do so to the answer's.
			go r.respond(ctx, p, l, q, client, netip.AddrPort{})
		}
	}
}

// respond answers one query. asked is the resolver that it was sent to, where that is known.
func (r *resolver) respond(ctx context.Context, p *pod, l packetListener, q query, client, asked netip.AddrPort) {
	message := r.answer(ctx, p, q, protocolUDP, func(ctx context.Context, q query) ([]byte, error) {
		if asked.IsValid() {
			return r.askByPacket(ctx, p.Netns, asked, q)
		}
		return askFirst(ctx, r.upstreams, func(ctx context.Context, upstream netip.AddrPort) ([]byte, error) {
			return r.askByPacket(ctx, p.Netns, upstream, q)
		})
	})
	var err error
	if asked.IsValid() {
		err = l.Write(message, asked, client)
	} else {
		err = l.WriteOwn(message, client)
	}
	if err != nil {
		r.explain(p, q, err)
	}
}
