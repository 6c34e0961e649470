// Package waypoint is the L7 proxy of a namespace: HBONE in, HTTP routing and authorization, HBONE out. It is configured
// by the subset of Envoy's xDS that docs/waypoint-xds.md lists.
package waypoint
