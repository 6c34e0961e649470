package main

import (
	"context"
	"fmt"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// callWaypoint makes HTTP requests to the service, which a waypoint routes and authorizes, and adds their row.
func (d *demo) callWaypoint(ctx context.Context, method string, count int) error {
	c := lab.Call{
		To: d.orders.Addr(lab.ServicePortHTTP, false), HTTP: true, Method: method, Host: "orders.shop", Count: count,
		SameConnection: true, Size: 500,
	}
	o, err := d.w.Observe(ctx, d.web, c, 1)
	if err != nil {
		return fmt.Errorf("%s through the waypoint: %w", method, err)
	}
	waypoint := "spiffe://cluster.local/ns/shop/sa/waypoint"
	r := row{
		scene: "waypoint", from: d.web.Name, to: fmt.Sprintf("service orders, %d× %s", count, method), path: pathOf(o),
		clear: o.Wire.Clear, tunnel: o.Wire.Tunnel,
	}
	if r.source, err = d.gate.WaypointSaw(); err != nil {
		return err
	}
	r.source = short(r.source)
	if o.Outbound != nil {
		r.destination = short(o.Outbound.DestinationIdentity)
	}
	r.must(r.source == short(d.web.Identity()), "the waypoint must see the client's identity")
	r.must(r.path == pathWaypoint, "the path must be %s", pathWaypoint)
	r.must(r.destination == short(waypoint), "the waypoint must prove who it is")
	r.must(o.Wire.Clear == 0 && o.Wire.Markers == 0, "%d bytes are readable on the link", o.Wire.Clear)
	if method != "GET" {
		last := o.Answer.Last()
		r.outcome = fmt.Sprintf("%d %s", last.Status, last.Body)
		r.must(last.Status == 403, "it must be denied with 403: %s", o.Answer)
		d.rows = append(d.rows, r)
		return nil
	}
	// The waypoint's own connections stay open, and have no line in a log yet; the server's proxy has counted them.
	accepted, err := d.w.Nodes[1].Accepted(ctx, waypoint, d.v1.Identity())
	if err != nil {
		return err
	}
	r.must(accepted > 0, "the server's proxy must have seen the waypoint's identity")
	if accepted > 0 {
		r.destination += " → " + short(d.v1.Identity())
	}
	d.judgeSplit(&r, o.Answer, count)
	d.rows = append(d.rows, r)
	return nil
}

// judgeSplit wants the shares of the route's weights: ten in a hundred for v2, give or take what chance may do.
func (d *demo) judgeSplit(r *row, a lab.Answer, count int) {
	servers := a.Servers()
	r.outcome = fmt.Sprintf("allowed, %d× v1, %d× v2", servers[d.v1.Name], servers[d.v2.Name])
	r.must(a.OK() && len(a.Attempts) == count, "all requests must succeed: %s", a)
	share := float64(servers[d.v2.Name]) / float64(count)
	r.must(share > 0.06 && share < 0.14, "v2 must get a tenth, it got %.1f %%", 100*share)
}
